"""Training scorers: the recipe, the loop over arms and seeds, the loss, the state that survives failures."""
