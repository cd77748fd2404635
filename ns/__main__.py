from ns.cli import main

main()
