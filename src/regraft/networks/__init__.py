"""Where pretrained networks come from: one file per source."""
