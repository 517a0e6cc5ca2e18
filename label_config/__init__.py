"""Ready label configs for Label Studio, as XML files beside this one. Nothing here is executed."""
