"""The recipes themselves, one file a method."""
