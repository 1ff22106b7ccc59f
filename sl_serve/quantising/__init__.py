"""Weights quantised once, with calibration, into a folder that starts at once.

A pass over the model, layer by layer: what enters each matrix decides how its numbers are rounded.
"""
