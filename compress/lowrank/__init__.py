"""Low-rank forms of layers: decompositions, factors solved on data, ranks and what they cost in answers."""
