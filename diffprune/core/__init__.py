"""Values and contracts. torch only: no transformers, no Ray, no pyarrow below this line."""
