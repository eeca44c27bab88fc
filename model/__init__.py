"""What is computed: networks, memory bank and alignment losses. Knows no Ray, Zarr, files or command line.

The project's one legend of shapes, used in every docstring and comment:

    B clips      T frames          P patch tokens    C visual width
    Q queries    L text tokens     N = Q + L         M memory slots
    D teacher width                H hidden width    U aligned levels

Equation numbers are those of the Diff-LMM paper (IJCAI 2025).
"""
