"""Floor 4, server: what stands around Gradio, so that the page can be left running on a public address.

Place in the flow: `request -> middleware (route, rate, size) -> Gradio -> page (session, files) -> alignment.ui`, with
`uploads` for files. `Service` puts them together.
"""

from alignment.server.gradio_internals import check_gradio
from alignment.server.logging import configure_logging
from alignment.server.page import GuardedBlocks
from alignment.server.service import Service, limit_arenas
from alignment.server.settings import Settings, add_options, check_address, host_in_url, read_port
from alignment.server.uploads import process_folder

__all__ = [
    "GuardedBlocks", "Service", "Settings", "add_options", "check_address", "check_gradio", "configure_logging",
    "host_in_url", "limit_arenas", "process_folder", "read_port",
]  # fmt: skip
