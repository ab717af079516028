"""Fields of configurations: text at the door, values inside."""
