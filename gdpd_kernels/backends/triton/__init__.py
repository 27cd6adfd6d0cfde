"""The GPU backend: Triton kernels whose source is written for one `DenoiserProgram` at a time.

``layout`` decides how values lie in registers and memory, ``walk`` and ``walk_back`` write the source of one walk
through a program, ``stream`` and ``stream_back`` that of one whose values lie in memory, ``module`` what goes around a
walk, ``kernels``, ``streamed`` and ``split`` join them to the kernels of a plan, ``tiles`` and ``activations`` hold the
device functions they call, ``tiling`` chooses sizes, ``launch`` compiles and runs, ``call`` is a call under way.
"""
