"""Label Studio's side of Facings: JSON, percent, labels and tokens. Holds no weights; boxes come from `model`."""
