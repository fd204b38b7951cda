"""Starts a real ComfyUI with this pack in it, for the commands of `run.py`.

| module      | what it does                                                          | runs in          |
|-------------|-----------------------------------------------------------------------|------------------|
| cli         | the command line                                                      | any Python       |
| environment | prepare: a ComfyUI and its Python in `.host/`, or the user's own      | any Python       |
| host        | serve: a running ComfyUI, as a context manager                        | ComfyUI's Python |
| guardian    | processes that end with the one that started them, whatever ends that | ComfyUI's Python |
| client      | run: queues workflows in a ComfyUI and follows them                   | ComfyUI's Python |
| demo        | what `run.py demo` queues and prints                                  | ComfyUI's Python |
| sweep       | what a sweep is asked for, and its folder                             | any Python       |
| sweep_workers | the workers and the driver of a sweep, on Ray                       | Ray's Python     |
| sweep_report  | what a sweep has made so far                                        | Ray's Python     |
| in_process  | ComfyUI and the pack inside the process of a test or benchmark        | ComfyUI's Python |

Nothing here is imported by the pack itself.
"""
