"""`keel study`: one file per study."""
