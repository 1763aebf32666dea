"""How do other libraries come to call this package? One module each, loaded by whoever has that library."""
