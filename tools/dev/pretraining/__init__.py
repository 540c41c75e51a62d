"""What `pretrain_tiny.py` trains the small models that ship with the package with."""
