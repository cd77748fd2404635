from ns.cli.app import main

main()
