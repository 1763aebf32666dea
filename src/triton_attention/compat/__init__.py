"""Whose signatures do we also speak? Each module here is a drop-in face of one library; import the one you replace."""
