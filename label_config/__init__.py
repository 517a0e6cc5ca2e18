"""Ready label configs for Label Studio, as XML files in this folder. Nothing here is executed."""
