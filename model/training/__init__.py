"""How the bundled checkpoint is made: rendered shelves, targets, losses and the loop that learns from them."""
