"""``python -m tests.support.echo_server PORT``: the service with an EchoTeacher, in a process that a test may kill."""

import sys
import time

from tests.support.serving_helpers import serving

if __name__ == "__main__":
    with serving(port=int(sys.argv[1])):
        while True:
            time.sleep(60)
