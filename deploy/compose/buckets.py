"""Makes the buckets named on the command line in the store of AWS_ENDPOINT_URL, once that answers."""

import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

SECONDS = 120

end = time.monotonic() + SECONDS
while True:
    try:
        s3 = boto3.client("s3")
        there = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
        for name in sys.argv[1:]:
            if name not in there:
                s3.create_bucket(Bucket=name)
        break
    except (BotoCoreError, ClientError):
        if time.monotonic() > end:
            raise
        time.sleep(2)
