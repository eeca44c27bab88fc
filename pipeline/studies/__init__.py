"""Ablation studies: many trainings that differ in a few named settings, from one cache, laid side by side.

The YAML files beside this module are the studies that are shipped; docs/ablations.md says how to write another.
"""
