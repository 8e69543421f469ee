"""A page that shows where pictures are defective, for Hugging Face Spaces or `python spaces_demo/app.py`.

The page is there before the model is: torch and the weights are loaded once it can be seen.
"""

import os
import threading

from server_settings import SERVER  # before Gradio, which reads the variables when it is imported

# isort: split
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from handlers import DEFAULT, MENU  # before torch, see there

# isort: split
import gradio as gr
from model_menu import load_model
from page import HERE, KEEP_SECONDS, MAX_UPLOAD_MB, demo
from server_disk import delete_old_files

from diffusionad_pipe.freed_memory import keep_freed_memory

MAX_WAITING = 20  # visitors in the queue
MAX_VISITORS = 200  # whose last result is kept in memory, about 4 MB each

demo.queue(max_size=MAX_WAITING)
threading.Thread(target=delete_old_files, args=(demo, KEEP_SECONDS), daemon=True).start()

if __name__ == "__main__":
    keep_freed_memory()
    # Fonts that the visitor's system has: none is downloaded.
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=("system-ui", "sans-serif"), font_mono="monospace"
    )
    # Gradio's own are hard to read: text needs a contrast of 4.5 to 1, level AA of WCAG 2.
    theme.set(
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        color_accent="*primary_600",
        link_text_color_dark="*secondary_400",
    )
    try:
        demo.launch(
            # Gradio's variable names the first of a hundred ports to try, this argument the only one.
            server_port=SERVER.port,
            theme=theme,
            css_paths=HERE / "style.css",
            head_paths=HERE / "head.html",
            max_file_size=f"{MAX_UPLOAD_MB}mb",
            state_session_capacity=MAX_VISITORS,
            enable_monitoring=False,
            footer_links=["api", "settings"],
            run_history=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise SystemExit(
            f"port {SERVER.port or '7860 to 7959'} is in use: set GRADIO_SERVER_PORT to another one"
        ) from error
    try:
        load_model(DEFAULT, MENU[DEFAULT])  # a visitor who comes earlier waits for this copy
    except ValueError as error:
        raise SystemExit(str(error)) from error
    demo.block_thread()
