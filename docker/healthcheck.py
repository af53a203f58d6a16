"""Exit with code 0 if the container is healthy: if HEALTH_URL (default: the service's /readyz) answers with status 200."""

import os
import sys
import urllib.error
import urllib.request

url = os.environ.get("HEALTH_URL", "http://127.0.0.1:8000/readyz")
try:
    with urllib.request.urlopen(url, timeout=8) as answer:
        sys.exit(0 if answer.status == 200 else 1)
except (urllib.error.URLError, OSError) as error:
    print(f"{url}: {error}")
    sys.exit(1)
