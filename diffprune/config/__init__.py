"""Field types of configurations: parsed from text once, values from then on."""
