"""The GPU backend: Triton kernels whose source is written for one `DenoiserProgram` at a time.

``layout`` decides how values lie in registers and memory, ``walk`` and ``walk_back`` write the source of one walk
through a program, ``module`` what goes around a walk, ``kernels`` and ``split`` join them to the kernels of a plan,
``tiles`` holds the device functions they call, ``tiling`` chooses sizes, ``launch`` compiles and runs.
"""
