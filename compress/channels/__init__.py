"""Removing channels: which go together, what each costs, and how what is left is solved anew."""
