"""Side-by-side measurements against peers. They use memory as the command line does, peers too."""

from pipeline.malloc import keep_memory

keep_memory()  # before numpy and torch start threads
