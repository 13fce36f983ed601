"""One file per framework; its name is what registers it."""
