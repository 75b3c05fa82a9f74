"""Faster layers and steps, and layers of 4 and 8 bits.

They do not change what the model computes.
"""
