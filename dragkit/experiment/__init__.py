"""Experiments: runs over data sets, arms and seeds, their table and their plot."""
