"""Adapters to trainers: each module names the seam that it fits, the layout it takes, and what it refuses.

Nothing is imported here: ``pyalign.integrations.trl`` needs TRL, and says so where it is missing.
"""
