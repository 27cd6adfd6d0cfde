"""The GPU backend: Triton kernels whose source is written for one `DenoiserProgram` at a time.

``layout`` decides how values lie in registers and memory, ``walk`` writes the source of one walk through a program,
``kernels`` joins walks to kernels, ``tiles`` holds the device functions they call, ``launch`` compiles and runs.
"""
