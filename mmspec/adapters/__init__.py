"""Kinds of targets: one file each, model-family details in tables."""
