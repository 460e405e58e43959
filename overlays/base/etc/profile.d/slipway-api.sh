# The API's environment for login shells, from the file that its services use. Sourced by any POSIX shell, with any
# options and variables, possibly twice: values in api.env replace existing ones; only PATH is extended.
if [ -r /usr/lib/slipway/api.env ]; then
    while IFS= read -r slipway_line; do
        case $slipway_line in
        '' | '#'* | LANG=*) ;;
        PATH=*)
            # Each directory of api.env once, before the others: existing entries are removed first.
            slipway_rest=":${PATH-}:"
            slipway_ours=${slipway_line#PATH=}
            slipway_line=$slipway_ours:
            while [ -n "$slipway_line" ]; do
                slipway_folder=${slipway_line%%:*}
                slipway_line=${slipway_line#*:}
                while :; do
                    case $slipway_rest in
                    *":$slipway_folder:"*)
                        slipway_rest=${slipway_rest%%":$slipway_folder:"*}:${slipway_rest#*":$slipway_folder:"}
                        ;;
                    *) break ;;
                    esac
                done
            done
            # An empty entry would mean the current directory.
            while :; do
                case $slipway_rest in
                *::*) slipway_rest=${slipway_rest%%::*}:${slipway_rest#*::} ;;
                *) break ;;
                esac
            done
            slipway_rest=${slipway_rest#:}
            slipway_rest=${slipway_rest%:}
            PATH=$slipway_ours${slipway_rest:+:$slipway_rest}
            export PATH
            ;;
        [A-Z]*=*) export "${slipway_line?}" ;;
        esac
    done </usr/lib/slipway/api.env
    unset slipway_line slipway_rest slipway_ours slipway_folder
fi
