"""Top floor, the service: what lets the page be left running where anybody may come.

Place in the flow: `request -> Door (is there anything, who, how much) -> Gradio -> Answers -> engine`, with `Folder`
and `Room` for what is uploaded, and `Running` for how it ends. `Service` puts them together.
"""

from alignment.ui.service.address import check_address, host_in_url, read_port
from alignment.ui.service.folder import Folder
from alignment.ui.service.logs import log_plainly, log_the_servers_too
from alignment.ui.service.memory import share_heaps
from alignment.ui.service.service import Service
from alignment.ui.service.settings import Settings, add_options

__all__ = [
    "Folder",
    "Service",
    "Settings",
    "add_options",
    "check_address",
    "host_in_url",
    "log_plainly",
    "log_the_servers_too",
    "read_port",
    "share_heaps",
]
