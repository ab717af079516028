"""Tables and sentences: which figures stand beside each other, and what is said about them."""
