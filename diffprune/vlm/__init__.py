"""Loading any vision-language model, and what families share."""
