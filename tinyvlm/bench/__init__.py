"""Measurements that a person starts: `tinyvlm bench …`.  Each compares things in one run on one machine."""
