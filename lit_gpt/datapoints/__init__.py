"""The record of what a run was and what each step saw, and how to query it."""
