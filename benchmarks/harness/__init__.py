"""What every benchmark shares: worker processes, interleaved timing, ceilings, results and tables.

A benchmark is a coordinator. It starts one worker process for each setting of XLA's flags and one for
PyTorch, because flags hold for a process. Workers stay alive, blocked on a pipe while another one is timed.
"""
