"""What `dev.py` is made of: setting up, starting and talking to a real ComfyUI.

Standard library only (`frontend.py` alone needs Playwright), so that it runs before anything is
installed. The tests use the same modules through `quanttune.devtools`.
"""
