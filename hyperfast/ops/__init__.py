"""Fused operations, one file each: schema, fake, autograd and the table of implementations.

Layers and losses call `hyperfast.functional`; nothing above it imports from here.
"""
