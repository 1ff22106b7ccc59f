"""Calls of tools: how each family of models writes them, read and enforced."""
