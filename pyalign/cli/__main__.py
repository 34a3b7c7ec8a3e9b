from pyalign.cli import main

main()
