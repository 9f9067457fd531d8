"""What `harness.ablate` is made of.

variants   the axes and their variants, as data
jobs       commands in order, each done once; many of them here or on a cluster
cells      one variant with one seed: two training stages and an evaluation, each done once
record     seeds together: means, intervals, the paired difference from the final model
"""
