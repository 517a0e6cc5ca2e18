"""Ways in: the Label Studio app and its annotator, and the server that runs them."""
