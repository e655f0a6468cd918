"""Structures, decompositions and the two modules that hold factors. Knows no model and no method by name."""
