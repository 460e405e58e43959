# The API's environment for login shells, from the file that its services have. Sourced, twice perhaps, by any
# POSIX shell with any options and variables: what api.env fixes replaces what was there; only PATH keeps the rest.
if [ -r /usr/lib/slipway/api.env ]; then
    while IFS= read -r slipway_line; do
        case $slipway_line in
        '' | '#'* | LANG=*) ;;
        PATH=*)
            # Each of our folders once, ours first: what is there already is taken out before.
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
            # An empty entry would be the folder that one is in.
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
