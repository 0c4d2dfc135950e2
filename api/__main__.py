"""python -m api: serve the API."""

import argparse
import gc
import sys

import uvicorn

from api.main import create_app
from jobs.errors import TokenizerUnloadable
from jobs.examiner import check_tokenizer
from jobs.settings import Settings
from trainer import logs, tracing


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m api",
        description=__doc__,
        epilog="example: STIEFEL_DATABASE_URL=postgresql+psycopg://… python -m api --host 0.0.0.0. Behind a proxy, set "
        "FORWARDED_ALLOW_IPS to its address: clients' own are then taken from what it says.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="of the interface; 0.0.0.0: all. Default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="Default: 8000")
    arguments = parser.parse_args()
    settings = Settings()
    logs.configure(settings.log_format, settings.log_level)
    try:
        tracing.start("api", settings.traces)
        check_tokenizer(settings)
    except (tracing.TracingError, TokenizerUnloadable) as error:
        sys.exit(f"api: {error}")
    app = create_app(settings)
    # What is there now stays. To look through it for garbage takes 0.2 s, which a request now and then would wait.
    gc.collect()
    gc.freeze()
    # Requests are logged by the application, with their ids.
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_config=None, access_log=False)


if __name__ == "__main__":
    main()
