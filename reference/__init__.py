"""DUET's specification: pure NumPy in float64, every gradient derived by hand, to be read beside the paper.

Legend of dimensions. Docstrings and shape comments, here and in `duet_mlx`, use these letters and no others:

    B  batch                            N  queries
    T  tokens of the student's query    K  top tokens of a position
    P  tokens of the context            C  candidates of a position, K to 2K
    S  any sequence                     V  vocabulary
    n  supervised positions             D  model width
    H  heads                            R  LoRA rank

A subscript tells two sizes of one kind apart: a linear layer maps D_in to D_out, D_h is the width of one
head, H_kv the number of heads that have keys and values of their own.

Order of reading: context, teacher, losses (the objective), lora, adam, then duet (all of it on one screen);
parts, transformer and quantize for what stands below the logits; baselines and metrics for what DUET is compared by.
README.md maps each equation to its function and to the test that proves it.
"""
