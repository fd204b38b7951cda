"""Starts a real ComfyUI with this pack in it, for `run.py demo`, `run.py test` and `run.py bench`.

| module      | what it does                                                        | runs in            |
|-------------|---------------------------------------------------------------------|--------------------|
| cli         | the command line                                                    | any Python         |
| environment | the virtual environment and the ComfyUI in `.host/`                 | any Python         |
| existing    | a ComfyUI that the user has already                                 | any Python         |
| links, lock | a link to a folder, a lock between processes                        | any Python         |
| host        | a running ComfyUI, as a context manager                             | ComfyUI's Python   |
| guardian    | ends ComfyUI when the process that started it is gone, however      | ComfyUI's Python   |
| client      | queues workflows over HTTP and follows them                         | ComfyUI's Python   |
| progress    | shows a run's progress on the terminal                              | ComfyUI's Python   |
| in_process  | the host and the pack inside the process of a test or benchmark     | ComfyUI's Python   |
| demo        | the demo: queue, show, print the table                              | ComfyUI's Python   |

Nothing here is imported by the pack itself.
"""
