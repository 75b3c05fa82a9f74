"""Faster layers and steps, and layers of 4 and 8 bits.

Faster layers and steps compute what the plain ones compute, up to rounding. Layers of 4 and 8 bits
store rounded weights.
"""
